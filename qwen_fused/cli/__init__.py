"""The commands: flags, presets, and what each prints."""
