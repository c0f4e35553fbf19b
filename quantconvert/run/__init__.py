"""The impure half: carries out a plan. No policy here."""
