"""Generation over tp, pp and dp on the runtime's own stages: the embedded alternative to a serving engine, and the
reference that engines are checked against."""
