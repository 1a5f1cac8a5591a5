"""Operations whose derivatives torch gets wrong, written out in those that it gets right."""
