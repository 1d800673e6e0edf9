"""Every option, once: frozen dataclasses, checked on construction, read from YAML and the command line."""
