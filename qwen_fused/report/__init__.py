"""A run told and shown: its log, trackers, page and pictures."""
