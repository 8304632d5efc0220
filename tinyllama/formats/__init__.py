"""Files of other programs, in and out: one file per format; knows no model and no tinygrad."""
