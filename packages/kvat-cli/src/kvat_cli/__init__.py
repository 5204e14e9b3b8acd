"""The command `kvat`: each command is options plus one call of kvat-core."""
