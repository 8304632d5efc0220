/* The protocol of train/checkpoint.py: save, replace, prune, recover, go back, two runs, and a crash
   before any operation on the file system.

   A checkpoint is a number: the version that it holds, 0 where nothing has the name. Folders that
   are being filled or deleted have a partial name, which nobody takes for a checkpoint. Only renames
   change what a name holds, so each is one step; writing and deleting happen under partial names.

     final, next, old   NAME, .NAME.next and .NAME.old
     steps[], aside[]   step-* folders, and those renamed by going back
     partials           folders with partial names

   EXCHANGE: whether the system can swap two names in one step. test_checkpoint_protocol.py verifies
   this model, and replays runs that it prints on the real code, one operation after another. For
   these, REPLAY leaves out runs that end at once: processes train one after another until the crashes
   are used up, and each crash comes after some operations. */

#ifndef EXCHANGE
#define EXCHANGE 1
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#ifndef SAVES
#define SAVES 3
#endif
#define STEPS 2

byte final, next, old, partials;
byte steps[STEPS], aside[STEPS];
byte version = 1;    /* of the next save */
byte announced;      /* the newest version of `final` whose save returned */
byte announced_step; /* the newest version of a step-* folder whose save returned */
byte crashes = CRASHES;
bool held, kill; /* the lock of the run's folder; a crash that is due */

mtype = { op_begin, op_rename, op_exchange, op_discard, op_delete, op_aside };
#define SAY(operation)                                                                           \
  printf("%e final=%d next=%d old=%d steps=%d,%d partials=%d\n", operation, final, next, old, \
         steps[0], steps[1], partials)

/* What was announced is never gone: in every state a name holds it, or a later version. */
#define FINAL_KEPT (final >= announced || next >= announced || old >= announced)
#define HOLDS(i) (steps[i] >= announced_step || aside[i] >= announced_step)
#define STEP_KEPT (HOLDS(0) || HOLDS(1))
active proctype kept() {
end:
  !(FINAL_KEPT && STEP_KEPT) -> assert(false)
}

/* Deleting: a partial name first. The deletion itself may fail, and the partial name stays. */
inline discard(place) {
  atomic { place = 0; partials++; SAY(op_discard) }
  if
  :: atomic { partials--; SAY(op_delete) }
  :: skip
  fi
}

inline settle(place) {
  if
  :: place != 0 && final != 0 -> discard(place)
  :: atomic { place != 0 && final == 0 -> final = place; place = 0; SAY(op_rename) }
  :: place == 0
  fi
}

inline recover() {
  do
  :: atomic { partials > 0 -> partials--; SAY(op_delete) }
  :: break /* none, or one that cannot be deleted */
  od;
  settle(next);
  settle(old);
  assert(next == 0 && old == 0);
  assert(final >= announced) /* what a reader finds under the name */
}

inline save_final() {
  printf("save final %d\n", version);
  recover();
  atomic { fresh = version; version++; partials++; SAY(op_begin) }
  if
  :: atomic { final == 0 -> partials--; final = fresh; SAY(op_rename) }
  :: final != 0 ->
    atomic { partials--; next = fresh; SAY(op_rename) }
#if EXCHANGE
    atomic { next = final; final = fresh; SAY(op_exchange) }
    discard(next)
#else
    atomic { old = final; final = 0; SAY(op_rename) }
    atomic { final = fresh; next = 0; SAY(op_rename) }
    discard(old)
#endif
  fi;
  announced = fresh
}

/* One step-* folder is kept, the one just saved; older ones are deleted after it has its name. */
inline save_step() {
  printf("save step %d %d\n", version, at);
  recover();
  atomic { fresh = version; version++; partials++; SAY(op_begin) }
  atomic { partials--; steps[at] = fresh; SAY(op_rename) }
  other = 0;
  do
  :: other < at && steps[other] != 0 -> discard(steps[other]); other++
  :: other < at && steps[other] == 0 -> other++
  :: other == at -> break
  od;
  announced_step = fresh;
  at++
}

/* Resuming at an earlier step renames what came after it; nothing is deleted. */
inline go_back() {
  at--;
  printf("back %d\n", at);
  other = at;
  do
  :: atomic { other < STEPS && steps[other] != 0 ->
       aside[other] = steps[other]; steps[other] = 0; SAY(op_aside); other++ }
  :: other < STEPS && steps[other] == 0 -> other++
  :: other == STEPS -> break
  od
}

/* A process that trains: it holds the folder or is refused. The kernel frees a dead one's lock. */
proctype training() {
  byte fresh, other, at;
  if
  :: atomic { !held -> held = true; printf("start\n") }
  :: held -> goto ended /* "another process trains there" */
  fi;
  {
    printf("recover\n");
    recover();
    at = STEPS; /* behind the newest step-* folder */
    do
    :: at > 0 && steps[at - 1] == 0 -> at--
    :: at == 0 || steps[at - 1] != 0 -> break
    od;
    do
    :: version <= SAVES -> save_final()
    :: version <= SAVES && at < STEPS && steps[at] == 0 -> save_step()
    :: at > 0 && steps[at - 1] != 0 -> go_back()
    :: break
    od
  } unless {
    kill
  };
  atomic {
    if
    :: kill -> kill = false; printf("crash\n")
    :: else -> printf("end\n")
    fi;
    held = false
  }
ended:
  skip
}

#ifdef REPLAY
#define TRAINING (_nr_pr > 3) /* besides kept, death and init */
active proctype death() {
  do
  :: atomic { crashes > 0 && held && !kill ->
       if
       :: if
          :: crashes--; kill = true
          :: skip :: skip :: skip :: skip :: skip
          fi
       :: skip :: skip :: skip :: skip :: skip :: skip :: skip :: skip :: skip :: skip
       :: skip :: skip :: skip :: skip :: skip :: skip :: skip :: skip :: skip :: skip
       fi }
  od
}

init {
  byte runs = 0;
  do
  :: runs <= CRASHES && !TRAINING -> runs++; run training()
  :: runs > CRASHES -> break
  od
}
#else
active proctype death() {
  do
  :: atomic { crashes > 0 && held && !kill -> crashes--; kill = true }
  :: break
  od
}

init {
  byte runs = 0;
  do
  :: runs <= CRASHES -> runs++; run training()
  :: break
  od
}
#endif
