"""What all families share: dispatch with reasons, settings, the extension, transforms, checks, ops."""
