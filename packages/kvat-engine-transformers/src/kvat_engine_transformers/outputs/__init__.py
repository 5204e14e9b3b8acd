"""What users take over: the code of a snippet, a generation_config.json."""
