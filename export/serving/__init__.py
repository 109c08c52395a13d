"""SavedModels for TF Serving, and a client that checks a server."""
