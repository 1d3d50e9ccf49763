"""The commands, a file each, with the options beside the code they set; parser.py puts them together."""
