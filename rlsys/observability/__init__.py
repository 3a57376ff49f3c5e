"""What a run keeps of itself: `catalogue` defines every metric once; `run_directory` names every file;
`sinks` write them."""
