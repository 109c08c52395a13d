"""Export to LiteRT and TF Serving. The folder export/ of the checkout, installed as `se_keras.export`."""

if __name__ != "se_keras.export":
    raise ImportError(f"This package is se_keras.export: install se_keras and import that. Received: {__name__}")
