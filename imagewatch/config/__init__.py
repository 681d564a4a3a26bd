"""The configuration: schema, loading, where it is found, the API key."""
