"""The emulator's own tests, which know nothing of what it is used for."""
