"""SavedModels for TF Serving, and talking to a server."""
