"""Access: certificates, identities and their limits, and the addresses that need them."""
