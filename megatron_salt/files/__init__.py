"""Files on shared disks: whole or not at all, locked, hashed."""
