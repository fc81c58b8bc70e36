"""Ways to compute the ops: one small interface (`base`), one file per backend, and the list of them (`registry`)."""
