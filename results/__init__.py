"""Small raw runs behind the figures. Of these an installed copy has the tables that commands read; no code."""
