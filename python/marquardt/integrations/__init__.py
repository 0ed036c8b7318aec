"""Adapters to other libraries, each imported by its own name; `import marquardt` imports none of them."""
