"""A machine that executes the GPU kernel's linked PTX, and a stand-in for the GPU that its host's side sees."""
