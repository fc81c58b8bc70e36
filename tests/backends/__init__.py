"""Tests of what lies under the public ops."""
