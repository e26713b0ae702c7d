"""A reference of the T-Maze in plain Python, which shares no code with envs/."""

UP, DOWN, LEFT, RIGHT = range(4)

# The reflected Gray code: the list so far with a 0 in front, then the same list reversed with a 1 in front.
GRAY = [[]]
for _ in range(8):
    GRAY = [[0, *code] for code in GRAY] + [[1, *code] for code in reversed(GRAY)]


class Reference:
    """One episode. Observations are lists of the 10 bits that are not distractors."""

    def __init__(self, corridor_len: int, max_episode_steps: int, cue: str):
        self.junction = corridor_len - 1
        self.max_episode_steps = max_episode_steps
        self.cue = cue
        self.position = 0
        self.steps = 0
        self.total = 0.0
        self.first_obs = {"up": [0, 1], "down": [1, 0]}[cue] + GRAY[0]

    def step(self, action: int) -> tuple[list[int], float, bool, bool, bool]:
        """-> observation, reward, done, truncated, success."""
        reward, turned, success = -0.1, False, False
        if self.position == self.junction:
            if action in (UP, DOWN):
                turned = True
                success = {UP: "up", DOWN: "down"}[action] == self.cue
                reward = 4.0 if success else -1.0
        elif action == LEFT and self.position > 0:
            self.position -= 1
        elif action == RIGHT:
            self.position += 1
        self.steps += 1
        self.total += reward
        truncated = self.steps == self.max_episode_steps and not turned
        return [0, 0] + GRAY[self.position], reward, turned or truncated, truncated, success
