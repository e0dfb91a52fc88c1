-- Redeems a code, once. KEYS[1] the code. It is answered ok, or used if it was
-- redeemed before, with the session and when it expires; or gone.
local key = KEYS[1]
local state, session, expires = string.match(redis.call('GET', key) or '', '^(%a+):(.+):(%d+)$')
if not state or tonumber(expires) <= clock() then return {'gone'} end
if state == 'used' then return {'used', session, tonumber(expires)} end
redis.call('SET', key, 'used:' .. session .. ':' .. expires, 'KEEPTTL')
return {'ok', session, tonumber(expires)}
