"""The commands of `flashmoe`, a module each (cli.py names them), and what several of them share."""
