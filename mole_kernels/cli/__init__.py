"""The command line: inspect, doctor, convert, demo."""
