package main

import (
	"errors"
	"fmt"
)

// invariants checks what must hold of the hub whenever no call is under way,
// save that half-received messages count as queued too.
func (h *memoryHub) invariants() error {
	var errs []error
	sessions, rooms, queued := 0, 0, 0
	for i := range h.shards {
		sh := &h.shards[i]
		sh.mu.Lock()
		for id, s := range sh.sessions {
			sessions++
			s.mu.Lock()
			if s.room != nil {
				rooms++
			}
			n, err := s.invariants()
			if err != nil {
				errs = append(errs, fmt.Errorf("session %s: %w", id, err))
			}
			if s.ended || s.id != id || h.shard(id) != sh {
				errs = append(errs, fmt.Errorf("session %s is in the wrong place, or ended", id))
			}
			queued += n
			s.mu.Unlock()
		}
		sh.mu.Unlock()
	}
	if n := h.rooms.Load(); n != int64(rooms) || len(h.codes.rooms) != rooms {
		errs = append(errs, fmt.Errorf("%d rooms counted and %d codes, %d there", n, len(h.codes.rooms), rooms))
	}
	if n := h.sessions.Load(); n != int64(sessions) {
		errs = append(errs, fmt.Errorf("%d sessions counted, %d there", n, sessions))
	}
	if n := h.queued.used.Load(); n < int64(queued) {
		errs = append(errs, fmt.Errorf("%d bytes counted, %d wait in mailboxes", n, queued))
	}
	return errors.Join(errs...)
}

// find returns the session, whether it is over by the clock or not.
func (h *memoryHub) find(id sessionID) *memorySession {
	sh := h.shard(id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.sessions[id]
}

func (s *memorySession) invariants() (queued int, err error) {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if s.room != nil && len(s.seats) > maxPlayers {
		fail("%d seats of a room", len(s.seats))
	}
	if s.room != nil && s.hub.codes.rooms[s.room.Code] != s.id {
		fail("code %s leads elsewhere", s.room.Code)
	}
	for i, slot := range s.seats {
		if slot == nil && s.room == nil {
			continue
		}
		if want := string(rune('A' + i)); s.room == nil && slot.name != want {
			fail("seat %d is called %s", i, slot.name)
		}
		if s.room != nil && slot.state() == absent {
			fail("a seat of the room is kept for nobody")
		}
		if s.room != nil && (slot.claim == (claim{}) || s.claimed(slot.claim) != slot || s.member(slot.name, nil) != slot) {
			fail("member %s cannot be told from another", slot.name)
		}
		if slot.holder != nil && (slot.holder.slot != slot || slot.holder.session != s) {
			fail("seat %s is held by a stranger", slot.name)
		}
		if slot.holder != nil && slot.away != nil {
			fail("seat %s is held and reserved", slot.name)
		}
		if slot.away != nil && slot.claim == (claim{}) {
			fail("seat %s is reserved for nobody", slot.name)
		}
		bytes, presence := 0, int32(0)
		waiting := slot.queue.waiting()
		for j := range waiting {
			f := &waiting[j]
			bytes += f.size()
			if f.kind == kindPresence {
				presence++
			}
			if f.kind == kindMail {
				fail("mail in the queue of seat %s", slot.name)
			}
			if slot.holder == nil && f.buf != nil && len(f.buf.b) > 2*len(f.data) {
				fail("a frame of %d bytes that waits for seat %s keeps a buffer of %d", len(f.data), slot.name, len(f.buf.b))
			}
		}
		if bytes != slot.queueBytes || presence != slot.presence {
			fail("seat %s: %d bytes and %d presence frames counted, %d and %d queued", slot.name, slot.queueBytes, slot.presence, bytes, presence)
		}
		if presence > maxPresence || slot.holder == nil && presence > 0 {
			fail("seat %s has %d presence frames waiting", slot.name, presence)
		}
		mail, last := 0, uint64(0)
		for j := range slot.mail {
			f := &slot.mail[j]
			mail += f.size()
			if f.kind != kindMail || f.seq <= last || f.seq > slot.lastSeq || f.buf != nil {
				fail("seat %s: mail %d is out of order or malformed", slot.name, f.seq)
			}
			last = f.seq
		}
		if mail != slot.mailBytes || mail > mailBytes || len(slot.mail) > mailItems {
			fail("seat %s: %d bytes counted in %d items of mail, %d there", slot.name, slot.mailBytes, len(slot.mail), mail)
		}
		if len(slot.taken) > takeovers {
			fail("seat %s remembers %d takeovers", slot.name, len(slot.taken))
		}
		queued += bytes + mail + (len(waiting)+len(slot.mail))*s.hub.frameCost
	}
	return queued, errors.Join(errs...)
}

// invariants checks what must hold of the code table at every moment.
func (t *codeTable) invariants() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	if len(t.entries) != len(t.byExpiry) {
		errs = append(errs, fmt.Errorf("%d codes, %d in the queue", len(t.entries), len(t.byExpiry)))
	}
	for i, e := range t.byExpiry {
		if entry, ok := t.entries[e.key]; !ok || entry.expires != e.expires {
			errs = append(errs, fmt.Errorf("code %d is queued with another expiry, or gone", e.key))
		}
		if i > 0 && t.byExpiry.Less(i, (i-1)/2) {
			errs = append(errs, fmt.Errorf("the queue is out of order at %d", i))
		}
	}
	total := uint32(0)
	for digits, s := range t.spaces {
		taken, blocks := uint32(0), make([]uint16, len(s.blocks))
		for key := range t.entries {
			if n := uint32(key) - s.size; n < s.size {
				taken++
				blocks[n/codeBlock]++
			}
		}
		for i := range blocks {
			if blocks[i] != s.blocks[i] {
				errs = append(errs, fmt.Errorf("%d digits: %d codes counted in block %d, %d taken", digits, s.blocks[i], i, blocks[i]))
			}
		}
		if taken != s.taken {
			errs = append(errs, fmt.Errorf("%d digits: %d codes counted, %d taken", digits, s.taken, taken))
		}
		total += taken
	}
	if int(total) != len(t.entries) {
		errs = append(errs, fmt.Errorf("%d codes in no space", len(t.entries)-int(total)))
	}
	return errors.Join(errs...)
}
