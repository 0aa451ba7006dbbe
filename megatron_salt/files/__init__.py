"""Files on shared disks, and tables for people."""
