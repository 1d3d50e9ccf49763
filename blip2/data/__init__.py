"""Data: samples from annotation files and folders (`sources`, without torch), batches for training (`loader`)."""
