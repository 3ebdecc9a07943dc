"""Who is who: keys, certificates with roles, the consortium's authority, invitations."""
