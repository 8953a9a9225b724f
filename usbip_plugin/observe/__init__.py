"""What the agent tells people and machines about itself."""
