"""The first hour: init, schema, and the package as a library."""
