"""The commands as functions: the only place that knows both recipes and parts."""
