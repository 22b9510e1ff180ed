"""The thief hides: a suspect answers so that the owner's queries find no mark."""
