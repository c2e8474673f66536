"""The command line: `layerfusion info | extract | cache | sweep | train | evaluate | predict | explain`."""
