"""The ground floor: files, devices, random state, typed YAML."""
