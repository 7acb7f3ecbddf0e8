"""Where models come from: one package per framework, and one importer for all."""
