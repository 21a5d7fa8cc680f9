"""What `megadsl doctor` checks: links between ranks, this node, its installation and the file system. survey.py asks them all."""
