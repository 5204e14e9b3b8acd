"""What this machine is, read from the operating system and the driver."""
