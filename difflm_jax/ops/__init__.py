"""Operations on arrays: matmuls, attention, cross-entropy, random bits, and gradients. Does not depend on models."""
