"""The command line: one file per command, each thin: declare options, call, print."""
