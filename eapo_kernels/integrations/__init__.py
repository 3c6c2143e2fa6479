"""Adapters to other trainers, each importing its framework only when it is used; see docs/integrations.md."""
