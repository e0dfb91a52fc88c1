-- Looks at seats of an instance: is each still held, does something wait? What
-- is, lives on. KEYS: sessions; ARGV: instance, and for each its holder, seat
-- and claim. Answers for each o, n if it should look, l if it was lost and may
-- be had again, r if another has it, g if the session is gone.
local answers = {}
for i, key in ipairs(KEYS) do
  local holding, name, claim = ARGV[3 * i - 1], ARGV[3 * i], ARGV[3 * i + 1]
  local s = session(idOf(key))
  fetch(s, 'k', name .. ':h', name .. ':c', name .. ':a')
  local answer = 'o'
  if not get(s, 'k') then
    answer = 'g'
  elseif holder(s, name) == holding then
    if not isRoom(s) and call('PTTL', s.key) * 1000 < KEEP * 3 / 4 then
      schedule(s)
    end
    prolong('parley:seats:' .. ME, KEEP)
    if call('EXISTS', queue(s, name), mailbox(s, name)) > 0 then answer = 'n' end
  elseif holder(s, name) then
    answer = 'r'
  elseif isRoom(s) then
    answer = reserved(s, name) and 'l' or 'g'
  elseif reserved(s, name) and (claim == '' or get(s, name .. ':c') ~= claim) then
    answer = 'r'
  else
    answer = 'l'
  end
  answers[i] = answer
end
return reply('ok', answers)
