"""Chats: templates, and the prompts that they render."""
