"""Everything that makes a model: case tables, data, recipes and one module a stage."""
