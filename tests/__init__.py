"""Tests of topk_ortho; they mirror its tree."""
