"""The page that measures in a browser: its server, its devices, and the LiteRT.js that it loads."""
