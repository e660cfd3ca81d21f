"""How a result is shown: a page, its charts, a table on the terminal."""
