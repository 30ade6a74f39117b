"""The commands: flags, jobs, conversations, and what people see next to the text."""
