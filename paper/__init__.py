"""The paper's claims: one script each."""
