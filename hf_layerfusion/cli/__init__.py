"""The command line: `layerfusion extract | train | evaluate | predict | explain | info`."""
