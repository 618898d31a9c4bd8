"""What serving costs, against the engine called directly."""
