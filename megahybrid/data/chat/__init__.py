"""Chats: conversations as a template renders them, and which of the tokens the assistant wrote."""
